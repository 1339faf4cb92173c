"""Linear probes that learn from rows as they come, and keep none: of classes and numbers, for each text or each token.

targets.py     what each text or token is, which texts are held out, and the labels of the controls
learner.py     pure: softmax and linear regression by small steps, on dense and sparse rows
scores.py      pure: accuracy and R² on texts that were held out, with intervals
reading.py     rows of texts as they come, pooled, in buffers
trial.py       the probes of all tensors, and the baselines
report.py      the report and its file
run.py         the whole procedure, on a model or a store
"""
