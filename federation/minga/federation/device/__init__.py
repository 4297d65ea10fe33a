"""The agent on the edge node: enrols once, joins rounds, runs models on site."""
