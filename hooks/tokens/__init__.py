"""Which token is what: roles, chat turns, images, patches, spans, segments, the question; computed here, installed by `doors`."""
