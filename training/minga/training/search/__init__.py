"""The search for hyper-parameters.

    suggestions   what is tried next: random draws, a grid, Optuna's TPE
    halving       which trials are cut early
    population    population based training: the weak go on with the weights of the strong
    ledger        a file for each trial, from which an interrupted search goes on
    course        all of these together, without Ray: what begins, what is cut, what came of it
    campaigns     trials that are campaigns on virtual devices
    tuning        Ray Tune runs it
    picture       a page that shows it

Importing this package loads none of them.
"""
