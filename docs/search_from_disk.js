// Search needs a web worker, and browsers start none for pages that are opened from disk. There, this
// class runs the worker's script in a hidden frame instead, with the same messages.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.body.append(frame)
      this.scope = frame.contentWindow
      this.scope.postMessage = (data) => this.answer(data)
      const page = frame.contentDocument
      this.scope.importScripts = (...urls) => Promise.all(urls.map((each) => load(page, each)))
      this.ready = load(page, new URL(url, location).href)
    }

    answer(data) {
      const event = new MessageEvent("message", { data })
      this.dispatchEvent(event)
      this.onmessage?.(event)
    }

    postMessage(data) {
      this.ready.then(() => this.scope.dispatchEvent(new MessageEvent("message", { data })))
    }

    terminate() {}
  }

  function load(page, url) {
    return new Promise((resolve, reject) => {
      const script = page.createElement("script")
      Object.assign(script, { src: url, onload: resolve, onerror: reject })
      page.body.append(script)
    })
  }
}
