"""Faults at seeded moments, the same command again, and what must hold then. `python -m tests.chaos --help`.

pipelines.py   what is run: `small` (the real seam, child processes, MLflow and teacher on tiny stages), `135m` (a GGUF file of the
               real model) and `smoke` (the whole DAG)
world.py       where a cycle happens: a home on a disk of its own, MLflow and teacher on loopback, the command
faults.py      what goes wrong
invariants.py  what must hold after the same command was given again; records.py, what MLflow must hold then; figures.py, what figures
proxy.py       MLflow's address, behind which the answers may be late, wrong or lost
cycle.py       one fault from beginning to end; __main__.py many, and the table of them
"""
