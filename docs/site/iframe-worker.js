// Search in pages that are opened as files. A browser starts no Worker from file://; a hidden frame loads the same script
// by a tag, and hands messages on, as copies and later, as a Worker does. Zensical takes its own stand-in from a server
// unless a polyfill has this file's name.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      document.body.append(this.frame);
      const inner = this.frame.contentWindow;
      inner.postMessage = (data) => this.deliver(this, new MessageEvent("message", { data: structuredClone(data) }));
      const script = inner.document.createElement("script");
      script.src = new URL(url, location);
      this.ready = new Promise((loaded) => (script.onload = loaded));
      script.onerror = (event) => this.onerror?.(event);
      inner.document.body.append(script);
    }
    async postMessage(data) {
      const copy = structuredClone(data);
      await this.ready;
      const inner = this.frame.contentWindow;
      if (inner) this.deliver(inner, new inner.MessageEvent("message", { data: copy }));
    }
    deliver(whom, event) {
      setTimeout(() => {
        if (whom === this) this.onmessage?.(event);
        whom.dispatchEvent(event); // a window calls its own onmessage
      });
    }
    terminate() {
      this.frame.remove();
    }
  };
}
