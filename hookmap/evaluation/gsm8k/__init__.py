"""Evaluations on inspect_ai, with the activations of every answer kept.

    answers.py     pure: the number in an answer, by three rules of the literature
    calculator.py  pure: arithmetic, parsed and never evaluated as code
    problems.py    where the questions come from
    provider.py    inspect's model provider `hookmap/MODEL`: batches, and captures each batch
    gsm8k.py       the task: prompt, solver, tool, scorers
    results.py     the results folder, made of inspect's log and the captures
    run.py         all of it, and going on after a kill

Needs inspect_ai: `pip install "hookmap[eval]"`.
"""
