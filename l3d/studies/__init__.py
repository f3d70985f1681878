"""Run many decompositions and tabulate their figures: sweeps over settings, and the toys' recovery over seeds.

In: a list of settings or toys, and seeds. Out: one figure per run, Markdown tables, sweep.json and plots. Read first:
sweep.py; the paper's figures are in paper/.
"""
