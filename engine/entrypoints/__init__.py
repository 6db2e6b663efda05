"""HTTP: the native API, the OpenAI dialect, control, health, metrics, and the limits of connections and bodies."""
