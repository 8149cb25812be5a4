"""From one model to four parts: vision encoder, projector, token embedding, decoder; proven by replay."""
