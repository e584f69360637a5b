"""Small worlds whose truth is known exactly: scenes, their pictures, and everything that can be said of them."""
