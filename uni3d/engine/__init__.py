"""The engine: `build.initialize` makes one, `engine.Engine` trains."""
