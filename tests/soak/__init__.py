"""Real workers, real nodes, real faults, and a history that is checked.

``cd tests && python -m soak --seconds 120 --seed 7``

Clients append elements that occur once, log in and out, and change ids, at three
workers on three nodes and one SQLite file, while a nemesis breaks one thing at a time.
Every page is checked against what was acknowledged before it was asked for, and all
sessions at the end, when everything is whole again.
"""
