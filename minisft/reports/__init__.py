"""Reports for people: on the data, a document, a run. Figures come in, text and pages go out."""
