"""Methods that change the picture and watch the score; they need no gradient."""
