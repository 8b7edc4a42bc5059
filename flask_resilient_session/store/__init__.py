"""The order of steps: load, create, save, end, move; the copies and the row.

============================================  ==============
question                                      file
============================================  ==============
what can be done with a session               ``store``
its copies on their nodes                     ``replicas``
its row in SQL, breaker and debts             ``row``
loading                                       ``load``
saving, syncing, conflicts                    ``save``
logout and revocation                         ``end``
a new id                                      ``move``
on which terms a request may reach a session  ``context``
what these steps share                        ``steps``
============================================  ==============
"""
