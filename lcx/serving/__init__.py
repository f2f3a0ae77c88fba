"""A model behind the HTTP interface of OpenAI: any tool that speaks it can talk to one."""
