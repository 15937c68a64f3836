"""One drawing: the steps, the model that is asked, and what a method is given and yields."""
