"""Where pyqlora meets other libraries; each is imported only when its module is."""
