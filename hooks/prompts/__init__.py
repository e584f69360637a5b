"""The same prompt in another form, with parts left out or replaced; computed here, installed by `doors`."""
