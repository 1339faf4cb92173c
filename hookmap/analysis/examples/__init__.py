"""Maximally activating examples: the tokens at which a feature has its largest values, with their context.

features.py    what is looked at: features of a point, norms, directions
best.py        the best rows of many features, batched and mergeable
collecting.py  a sink that keeps them
result.py      the result and its JSON; files.py keeps it; page.py shows it
run.py         over a run
"""
