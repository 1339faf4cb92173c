"""Linear probes on a capture: is something that is known of each sample written in a tensor, and where?

    examples.py    which samples, how labels are read, which samples are one question
    pooling.py     a capture's rows -> one matrix [samples, features] at a time
    fitting.py     a matrix and labels, and shuffles of them -> directions and biases
    metrics.py     pure: AUROC, recall at few false positives, calibration
    folds.py       grouped cross-validation, shuffles, and layers chosen on the training part only
    controls.py    what lengths, words and the model's own certainty know of the label
    run.py         all of it, one tensor in memory at a time -> a report
    report.py      the report's document and its files; saved.py keeps the probes

Needs scikit-learn: `pip install "hookmap[eval]"`.
"""
