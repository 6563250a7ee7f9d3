"""What stages 1 and 2 share: decoder blocks one at a time, token classes, masked losses, exact folding."""
