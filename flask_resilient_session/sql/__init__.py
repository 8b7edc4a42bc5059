"""One table: columns, statements, connections, deadlines; knows rows, not sessions.

=========================================  ==============
question                                   file
=========================================  ==============
which columns and indexes                  ``table``
the UPDATE of a sync                       ``statements``
one call: retry, deadline, the table made  ``calls``
how many ask SQL at once, who is next      ``gate``
a frozen server                            ``watchdog``
how connections are made and checked       ``connections``
which database, which bind                 ``database``
what a database error means                ``errors``
=========================================  ==============
"""
