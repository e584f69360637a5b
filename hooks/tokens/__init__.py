"""Which token is what: roles, chat, images, patches, frames, spans, the question, words of a picture's prompt; installed by `doors`."""
