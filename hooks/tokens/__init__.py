"""Which token is what: roles, chat turns, images, patches, frames, spans, segments, words of a picture's prompt; computed here, installed by `doors`."""
