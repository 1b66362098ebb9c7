"""The bundled model's world of stickers: emoji drawings with colours, accessories and styles in places with styles."""
