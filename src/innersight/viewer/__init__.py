"""The viewer: one page, served live on loopback (`server`) or written as one file (`report`)."""
