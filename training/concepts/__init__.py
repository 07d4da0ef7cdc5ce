"""FineStyle's concept-oriented data scaling: which part of a picture each phrase of its prompt is about."""
