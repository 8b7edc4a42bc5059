"""One request: the session object, its cookie, Flask's interface.

======================================================  ==============
question                                                file
======================================================  ==============
open and save, as Flask calls them                      ``interface``
one session in one request, where its time is enforced  ``request``
the session object                                      ``session``
the cookie's format and header                          ``cookie``
the secret keys: seals of records, digests of ids       ``keys``
what nodes and SQL hold of a session right now          ``inspect``
======================================================  ==============
"""
