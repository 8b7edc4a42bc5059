"""A seeded simulator that tries to break the replication protocol.

The package's own store, loader, homes, cluster, breakers and durable rows run as
they are, one set per simulated worker process; nodes, SQL, time and chance are
fakes. Requests are greenlets, and every exchange with a node or with SQL is a point
where another one may go on, so that a seed is one interleaving with its faults, and
replays exactly.

* ``world``: who runs next, what time it is, what is still on its way.
* ``fakes``: memcached nodes and SQL that fail on demand.
* ``history``: what was asked and acknowledged, and what may therefore never be seen.
* ``hearing``: what a request may not have heard of yet, where a promise says so.
* ``rollout``: which keys and nodes are rolled out, and what that puts at risk.
* ``actions``: what an operator, or bad luck, does.
* ``plan``: what one seed does: requests and faults, as data that can be shrunk.
* ``more``: classes about time, SQL, settings and placement; what befalls all.
* ``scenario``: one plan carried out.
* ``upkeep``: what happens to all at once in it.
* ``mutations``: the protocol's rules, switched off one at a time.

From the command line: ``python -m tests.simulator --help``.
"""
