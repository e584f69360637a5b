"""The same prompt in another form: parts left out or replaced, fewer tokens, further rows, a second text; installed by `doors`."""
