"""Which kind of model a Task should have: contenders, compared by cross-validation.

contenders       what competes: the Task's own model, plain networks, and what is no network
boosting         gradient boosted trees
forest           isolation forests, for Tasks without targets
graphs           trees behind a network's preparation, as one ONNX model
links            what a Task's outputs are: numbers, probabilities, or logits
folds            how examples are divided, by chance, by owner or by time
comparison       intervals, paired tests, and the choice
crossing         the work itself, on Ray; what is done is kept
"""
