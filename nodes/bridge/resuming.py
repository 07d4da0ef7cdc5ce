"""What a trainer does where a run of its file name is there already."""

AUTOMATIC, CONTINUE, ANEW, AS_IT_IS = "automatic", "continue", "begin anew", "use as it is"
RESUME = (AUTOMATIC, CONTINUE, ANEW, AS_IT_IS)
