"""How a few words before a question change the answers and the activations. One YAML file, four stages.

    document.py    the file: model, prefixes, samples, sampling, captures, rewards, report; validated
    rewards.py     pure: the rewards of an answer
    questions.py   every question after every prefix
    generating.py  the answers, as one inspect_ai task, with activations
    scoring.py     rewards as an inspect_ai scorer -> answers.jsonl and a scored log
    comparing.py   pure: paired tests over questions, intervals, Holm's correction
    separation.py  where in the layers the activations of two prefixes differ
    report.py      the report's document and its files; charts.py and page.py draw it
    run.py         the stages, each resumable

Needs inspect_ai and scikit-learn: `pip install "hookmap[eval,viz]"`.
"""
