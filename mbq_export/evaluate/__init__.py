"""6  Bundle -> Report: does it compute what it should, how good is it, how fast."""
