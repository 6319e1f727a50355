"""Several commands as one: named steps whose outputs lie in folders named by their inputs, run once each."""
