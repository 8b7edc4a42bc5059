"""What runs outside of requests: the reaper, revocation, the commands.

=============================  ==============
question                       file
=============================  ==============
one pass of the reaper         ``reaper``
ending the sessions of a user  ``revocation``
the command line               ``cli``
=============================  ==============
"""
