"""What the terminal's commands do, one module a theme. `flows.cli` imports each when it is called."""
