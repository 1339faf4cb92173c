"""Linear probes on a capture: whether, and where, a tensor encodes something that is known of each sample.

    examples.py    samples, their labels, and which of them belong to one question
    pooling.py     reads a capture's rows into matrices [samples, features], one at a time
    fitting.py     fits directions and biases to a matrix and labels
    metrics.py     pure: AUROC, recall at few false positives, calibration
    folds.py       grouped cross-validation, shuffles, and the choice of a layer on training data only
    controls.py    baselines: lengths, words and the model's own log-probability
    saved.py       the probes' file
    run.py         the whole procedure, one tensor in memory at a time
    report.py      the report and its files

Needs scikit-learn: `pip install "hookmap[eval]"`.
"""
