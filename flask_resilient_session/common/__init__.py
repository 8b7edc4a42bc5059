"""What every part may use: errors, the clock, signals and counters, waiting, breakers.

================================================================  ==============
question                                                          file
================================================================  ==============
which errors exist                                                ``errors``
what time is it                                                   ``clock``
which signals and counters exist, how sessions are named in logs  ``events``
when is a node, or SQL, skipped                                   ``breaker``
what may one request wait in all                                  ``patience``
who of one process goes first                                     ``queue``
================================================================  ==============
"""
