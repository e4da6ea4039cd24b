"""Why did it fail? From the text of a log to the cause and the next step."""
