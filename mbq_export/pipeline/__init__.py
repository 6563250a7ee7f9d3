"""`build`: the stages in order, each check that is cheap before any work that is long."""
