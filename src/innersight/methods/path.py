"""Methods that follow a path or average over points around the picture."""
