"""The same prompt in another form: with parts left out or replaced, with fewer tokens, in further rows, or beside a second text; installed by `doors`."""
