"""Statistics of activations, summed up while a model runs: no row is kept.

wanted.py        which reductions, by which groups of rows
accumulators.py  sums of rows, for each group: float64, mergeable. sketches.py: quantiles
reducer.py       a sink that sums up the rows it gets
statistics.py    the result; files.py keeps it
run.py           over a run, or over a stored capture
"""
