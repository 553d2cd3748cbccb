"""The lab: the catalogue of claims, their runs, verdicts, store, plots and races.

The lab knows rows and experiments and no method: an experiment is loaded by its row's
id, in a worker process. Everything that the command line needs to list and show rows is
pure standard library.
"""
