"""Alarms that act: from an alarm to a better champion, within limits, told in one journal.

    alarms       what is heard, from Alertmanager's webhook or from the monitor's log
    policy       whether a case is opened, and what comes next in it: pure
    journal      what was heard, decided and done, in one SQLite file
    receiver     the HTTP endpoint of the webhook
    work         one case, in a process of its own: train or federate, judge, promote
    responder    listens, decides, and runs the work of the open case

A *case* is what one or several alarms led to. There is one at a time. It goes on where it was after
a crash of any of these processes, and nothing in it happens twice.
"""
