// The dialog that asks for the API key.
import { keyGiven } from "./api.js";
import { html, useEffect, useRef, useState } from "./ui.js";

export function KeyDialog({ open, refused, close }) {
  const dialog = useRef(null);
  const [typed, setTyped] = useState("");
  useEffect(() => {
    if (open && !dialog.current.open) dialog.current.showModal();
    if (!open) dialog.current.close();
  }, [open]);
  const end = (key) => {
    setTyped("");
    close();
    keyGiven(key);
  };
  return html`<dialog
    ref=${dialog}
    aria-labelledby="key-title"
    aria-describedby="key-note"
    onCancel=${(event) => {
      event.preventDefault();
      end(null);
    }}
  >
    <form
      onSubmit=${(event) => {
        event.preventDefault();
        if (typed.trim() !== "") end(typed.trim());
      }}
    >
      <h2 id="key-title">API key</h2>
      <p id="key-note">This server asks for one. It is kept in this tab until you close it.</p>
      <div role="alert">${open && refused && html`<p class="error">The server refused that key.</p>`}</div>
      <label class="field">
        <span>Key</span>
        <input type="password" autocomplete="off" spellcheck=${false} value=${typed} onInput=${(event) => setTyped(event.target.value)} />
      </label>
      <div class="actions">
        <button type="button" onClick=${() => end(null)}>Not now</button>
        <button type="submit" class="main" disabled=${typed.trim() === ""}>Use this key</button>
      </div>
    </form>
  </dialog>`;
}
