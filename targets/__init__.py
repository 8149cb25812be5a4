"""Target profiles: one TOML file per runtime or device."""
