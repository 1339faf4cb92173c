"""Dictionaries: sparse autoencoders and transcoders, of any program, as one kind of object.

dictionary.py   what a dictionary is: encode, decode, where it was trained
loading.py      reads a folder or a hub id; formats.py: what each program's files mean
saving.py       writes SAELens's files
writing.py      a dictionary in a run: spliced in, features clamped, steered, left out
evaluating.py   how good it is, by SAEBench's core metrics
"""
