"""The bundled model and its frozen questions."""
