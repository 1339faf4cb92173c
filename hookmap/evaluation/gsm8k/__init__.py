"""Evaluations on inspect_ai, with the activations of every answer kept.

    problems.py    where the questions come from
    task.py        inspect's task: prompt, solver, tool, scorers
    answers.py     pure: the number in an answer, by three rules of the literature
    calculator.py  pure: arithmetic, parsed and never evaluated as code
    draws.py       how answers are drawn
    gathering.py   copies each answer's activations into one capture
    results.py     the results folder, made from inspect's log and the captures
    run.py         runs all of it, and resumes after a kill

The model provider is in ../inspect_provider.py.

Needs inspect_ai: `pip install "hookmap[eval]"`.
"""
