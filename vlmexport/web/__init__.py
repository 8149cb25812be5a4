"""The static page that runs an export of the ``transformersjs`` layout in a browser."""
